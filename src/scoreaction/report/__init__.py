"""Reports, figures and model cards of finished runs."""
