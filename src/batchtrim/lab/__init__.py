"""The lab: the whole family of methods under one harness, from the command line.

``batchtrim compare`` trains the same network with several methods and seeds, records every run, and reports with
paired statistics. A run's way down: ``cli``, ``execute`` (many runs), ``run`` (one run), then ``methods`` and ``task``.
A record's way up: ``records``, ``analyse`` (numbers and verdicts), ``present`` (sentences, tables, pages).
"""
