"""One file -> many training runs with their records, that survive interruptions and are never counted twice."""
