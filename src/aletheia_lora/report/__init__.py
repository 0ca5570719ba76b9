"""From the dict of a finished comparison to tables, figures and one HTML page. Never trains, never imports torch."""

from .page import finding, render_page, write_page
from .plots import plot_heldout, plot_pareto, plot_probe_scores, plot_scores, plot_step_time, write_plots
from .tables import check_record, comparison_table, markdown

__all__ = [
    "check_record",
    "comparison_table",
    "finding",
    "markdown",
    "plot_heldout",
    "plot_pareto",
    "plot_probe_scores",
    "plot_scores",
    "plot_step_time",
    "render_page",
    "write_page",
    "write_plots",
]
