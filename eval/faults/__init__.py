"""The fault suite:  python -m eval.faults [--quick] [--only KIND ...] [--out FILE.json]

It injects faults into tiny runs, one at a time, each in a process of its own, and counts what came of them:

    survived   the result is the one of the undisturbed run, or one line says what is wrong and what to do
    silent     exit 0, another result, and nothing said
    traceback  an error that nobody foresaw, or the process was aborted
    hung       not ended in time
    executed   code of a stranger ran
    wrote      a file elsewhere was changed, for example through a link
    lost       one line, but not as promised: work that must survive did not, or a wrong exit code

"The result of the undisturbed run" means: the same SHA-256 of all weights, every figure of every step's log equal as a
hex float, and the same files. A fault that cannot be injected here is skipped with the reason, and never counted.
"""
