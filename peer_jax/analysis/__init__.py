"""From finished runs to rows, fits, figures and a report."""
