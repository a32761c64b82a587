"""Turn numbers into sentences, tables and pages."""
