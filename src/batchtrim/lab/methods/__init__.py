"""The methods: ``table`` has a row for each; ``base`` and ``relatives`` have those that need more than a trimmer."""
