"""Tables: records as rows, filtered, formatted, drawn, compared."""
