"""The methods that are compared: ``table`` has a row for each, ``rules`` those that are more than a trimmer."""
