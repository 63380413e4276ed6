"""Capture, teacher transport and gradient injection across tensor-, pipeline- and sequence-parallel ranks.

At forward time of a microbatch on an early stage the teacher does not exist yet; at *backward* time it does, in every
pipeline schedule. So a tap on the student layer saves what the loss needs, the last stage's forward sends the detached
teacher back on process groups of its own, and the tap's backward computes the loss and adds its local gradient to the
one that arrives from upstream. ``docs/architecture.md`` draws it.
"""
