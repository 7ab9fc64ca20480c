"""``mitrain compare``: methods × tasks × points of an axis × seeds, each cell in a process of its own.

study      the file that says what is compared      cells    what its cells are, and which configuration each has
worker     what the process of a cell does          measures bytes and operations of one training step
counts     cells that are counted, not trained      processes  a process with a limit of time
compare    all cells, resumed where they stopped    table, plots  made from the result rows alone
"""
