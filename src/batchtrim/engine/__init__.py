"""Engines: how a trimmed step is computed. All keep the same samples and, if they can, give the same gradient.

=========  ================================  ===========  ==========================================================
engine     how                               cost/plain   exact where
=========  ================================  ===========  ==========================================================
exact      full graph, mean of the kept      1            always: it defines what is right
two_pass   forward without a graph, then     (1 + 3q)/3   samples do not interact; dropout is drawn anew, BatchNorm
           forward and backward on the kept               normalises the kept by their own statistics
shared     one forward, backward on kept     (1 + 2q)/3   always, if it runs; rows that interact cost more;
                                                          BatchNorm by the kept rows' means in backward
auto       shared, two_pass or exact         at most 1    as the engine it picks
=========  ================================  ===========  ==========================================================

``trimmed_forward.py`` is the public interface, ``protocol.py`` what every engine offers, and ``batch.py`` what a step
returns. ``forward.py`` runs the user's model and loss, inside the wrappers of ``wrappers.py`` (DistributedDataParallel,
Fabric). ``rows.py`` cuts a batch to rows.

A tour of the shared engine, in the order of a step:

1. ``shared.py`` runs a step. ``capture.py`` traces model and loss (``traced_function.py``) into graphs, which
   ``graphs.py`` prepares to run. The private parts of torch's compiler are asked in few places: ``capture.py``,
   ``inductor.py``, ``operators.py`` (facts about operators), ``symbolic.py`` (sizes that are symbols),
   ``second_derivatives.py`` and ``compilation.py``.
2. On a new trace, before it runs: ``proof.py`` labels the forward graph (where do rows lie?) and proves the backward
   graph (which operators may run on kept rows?), by the rules of ``rules.py`` and ``rules_*.py``, a file per kind of
   operator, over the layouts of ``layout.py``. ``split.py`` splits the backward into two graphs; ``cost.py`` counts
   what that saves. ``eager.py`` runs the model's own Python once, and compares the trace with it: losses, gradient,
   outputs and state.
3. ``sliced.py`` runs the forward and puts what it saves onto a tape (``tape.py``). ``Trimmer`` chooses.
   ``cutting.py`` cuts the tape.
4. ``loss.backward()``: ``backward.py`` runs the upper graph on the kept rows, puts gradients back, runs the lower one.
   With ``create_graph=True``, ``second_derivatives.py`` runs the traced function again under autograd, or has
   ``rerun.py`` run the model's own Python. ``unasked.py`` leaves out gradients of what the loss does not use.

What may go wrong on the way: ``reasons.py`` explains why a model could not be traced, and ``speech_models.py`` makes
one kind of model traceable. ``unguarded.py`` notices changes that the guards of a trace do not see, ``checkpoints.py``
what activation checkpoints repeat in backward. ``batch_norm.py`` measures how far BatchNorm's gradient is off.

If the model's Python runs twice, ``reachable.py`` finds all that it may change, by the kinds of objects of ``kinds.py``
and the names of ``names.py``; ``state.py``, ``contents.py`` (one object), ``generators.py`` and ``writes.py`` put that
back. ``model_facts.py`` answers what engines ask of a model. ``compilation.py`` finds what the user compiled, runs
it as plain Python, or compiles a copy alike. ``gradients.py`` computes gradients that no hook sees, ``precision.py``
knows about TF32, and ``operator_mode.py`` is the base of the modes that see every operator.

``two_pass.py`` has ``probe.py`` check on a few rows that samples do not interact, ``tolerance.py`` compare results
within the model's precision, and ``memory.py`` find parts of the batch that share memory; on a GPU, operators that
could end the process run on the CPU first (``cpu_first.py``). For ``batchtrim.testing.check_engine``,
``side_by_side.py`` runs an engine beside a plain step, each a ``side.py`` with a copy of the model by ``copies.py``;
``left.py`` compares gradients as objects.

``auto.py`` runs the first step that might pay with ``exact`` while ``cost.py`` counts it. It traces the model as soon
as 100 steps would pay the trace back.

If the user compiled the model, the first step of a trace still runs as above, to check it against the model. From the
second step on ``compiled.py`` runs it: ``inductor.py`` compiles the forward, and all of step 4, cutting included, as
one function.

===============  =======================  =======================  ===================================================
exception        raised by                caught by                what follows
===============  =======================  =======================  ===================================================
Mixes            a rule                   proof.py                 backward is whole from this operator on
CannotCapture    every step of a trace    shared.py                EngineRefused; the state is as before
NewTrace         sliced.py                shared.py                the model is run to compare, then the trace
CannotCompile    inductor.py              compiled.py              a warning; the graphs run operator by operator
EngineRefused    shared.py, two_pass.py   auto.py, or the caller   another engine; the state is as before
===============  =======================  =======================  ===================================================

Glossary. *Row*: the unit of choice, a sample or a token. *Kept*: chosen. *Layout*: where a tensor holds its rows.
*Axis*: the dimension of one row symbol, and its factors. *Whole*: a value that belongs to no row; a part that runs on
all. *Vanish*: to be zero in every row that is not kept. *Mixes*: makes one row of another. *Upper*, *lower*: backward
above and below the first operator that mixes rows. *Crossing*: an operator of the upper part that runs on all rows,
since it draws dropout by their positions. *Pinned*: must be saved, since kept rows cannot recompute it. *Tape*: what
one forward saved.
"""

from batchtrim.engine.trimmed_forward import ENGINES, TrimmedForward

__all__ = ["ENGINES", "TrimmedForward"]
