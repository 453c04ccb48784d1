"""Tables: records as rows that are filtered, formatted, drawn and compared."""
