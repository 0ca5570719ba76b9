"""From the dict of a finished record to tables, figures and one HTML page. Never trains, never imports torch."""

from .forgetting import check_forgetting, forgetting_finding, forgetting_table
from .forgetting_page import render_forgetting, write_forgetting
from .forgetting_plots import draw_forgetting
from .page import finding, render_page, write_page
from .plots import plot_heldout, plot_pareto, plot_probe_scores, plot_scores, plot_step_time, write_plots
from .tables import check_record, comparison_table, markdown

__all__ = [
    "check_forgetting",
    "check_record",
    "comparison_table",
    "draw_forgetting",
    "finding",
    "forgetting_finding",
    "forgetting_table",
    "markdown",
    "plot_heldout",
    "plot_pareto",
    "plot_probe_scores",
    "plot_scores",
    "plot_step_time",
    "render_forgetting",
    "render_page",
    "write_forgetting",
    "write_page",
    "write_plots",
]
