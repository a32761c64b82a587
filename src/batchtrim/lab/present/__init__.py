"""Numbers into sentences, tables and pages."""
