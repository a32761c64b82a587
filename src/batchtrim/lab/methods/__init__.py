"""The methods: ``table`` has a row for each, ``rules`` and ``relatives`` those that are more than a trimmer."""
