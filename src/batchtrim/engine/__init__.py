"""Engines: how a trimmed step is computed. All give the same samples and, where they can, the same gradient.

=========  ================================  ===========  ==========================================================
engine     how                               cost/plain   exact where
=========  ================================  ===========  ==========================================================
exact      full graph, mean of the kept      1            always: it defines what is right
two_pass   forward without a graph, then     (1 + 3q)/3   samples do not interact; dropout is drawn anew, BatchNorm
           forward and backward on the kept               normalises the kept by their own statistics
shared     one forward, backward on kept     (1 + 2q)/3   samples do not interact; same dropout; BatchNorm by the
                                                          whole batch's statistics, its backward averaged over the kept
auto       shared, two_pass or exact         at most 1    as the engine it picks
=========  ================================  ===========  ==========================================================
"""

from batchtrim.engine.forward import ENGINES, TrimmedForward

__all__ = ["ENGINES", "TrimmedForward"]
