"""The lab: the whole family of methods under one harness, from the command line.

``batchtrim compare`` trains the same network with several methods and seeds, records every run, and reports with
paired statistics. ``config`` says what a run is, ``data``, ``conditions``, ``augment`` and ``models`` what it is made
of, ``methods`` is the table of methods, ``train`` the loop, ``grid``, ``sweep`` and ``cluster`` do many runs,
``records`` keeps them, ``stats`` and ``report`` read them.
"""
