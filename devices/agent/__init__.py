"""Measure one model file in this process: ``python -m edgekd.devices.agent job.json``. One block is one run of it.

With several jobs (``--seed 0 --threads 1 a/job.json b/job.json``) each has a process of its own, all on the same cores,
and these take turns of a few inferences: one works while the others wait, so that whatever slows the machine slows all
alike. Paths in a job are then relative to its own folder; those of a single one to the working directory.

It stands alone (standard library, NumPy and the runtime of the job's target): ``devices/_agents.py`` packs this folder
into one file, which host and ssh run with a Python that need not have edgekd.

The job is a JSON object, the result another; ``job.KEYS`` names the job's fields. Beside them may stand ``cores``, a
list of processors to run on, and for a language model with caches ``decoder``: its ``context``, and ``new_tokens`` of
an answer. Exit code 0 when the result was written; 1 with one line on stderr when it failed; 2 when the job is wrong.
"""
