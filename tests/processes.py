"""Child processes forked from an interpreter that has imported the stack once.

A fresh interpreter needs 10 s of CPU for its imports. The server that these children are forked from has computed no
gradient and holds no GPU, as a fork of the test process might.
"""

import multiprocessing

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["hf_disranker.recipes.score", "hf_disranker.recipes.distill", "hf_disranker.recipes.cpt"]
)


def start(function, *args):
    """Start a child process that calls a function which can be imported by its name."""
    process = _CONTEXT.Process(target=function, args=args, daemon=True)
    process.start()
    return process
