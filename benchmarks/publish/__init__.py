"""The results in ``benchmarks/results`` as tables in the pages: ``python -m benchmarks publish``.

A page has a place for a block between two marks, ``<!-- published: NAME -->`` and ``<!-- to here -->``. NAME is that of
a result (`results.Result`), with ``#TABLE`` where it has several, or one of `pages.BLOCKS`. Every block says where its
figures come from: the command, the commit, the machine. Nothing here needs more than Python.
"""
