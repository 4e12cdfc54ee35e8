"""`cadtrain doctor`: what this machine has, what is wrong with it and how to mend it.

A check returns findings and never raises: what it asks for may be missing, broken or hanging, and that is a finding.
Everything that may crash or hang (torch, DeepSpeed, the CAD kernel, collectives) is asked in child processes.
"""
