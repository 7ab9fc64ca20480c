"""``mitrain bench faults``: faults set off in whole processes on tiny models, and what came of each.

`suite` runs the cases and writes the table, `lab` starts commands and looks at what they leave, `inject` is what happens
inside a process that is to fail, `world` makes models and data. The cases stand by theme in `training`, `folders`,
`ranks`, `stores`, `inputs` and `exports`.
"""
