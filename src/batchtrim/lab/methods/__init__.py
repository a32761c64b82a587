"""The methods: ``table`` has a row for each; ``rules`` and ``relatives`` have those that need more than a trimmer."""
