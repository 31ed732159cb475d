"""The teacher's questions and what its answers mean. A judge renders requests and reads replies; it does no I/O.

- `routing`: objective or subjective, and the topic
- `difficulty`: does an open-ended question need reasoning?
- `performance`: is a checkable question answered at once, in eight tries?
- `reasoning`: chains of thought, what they are checked for, and direct answers
- `answers`: comparing a reply with its reference
"""
