"""Programs whose output is evidence: each writes what a record is made of."""
