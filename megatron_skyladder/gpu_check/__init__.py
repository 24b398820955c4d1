"""``skyladder check-gpu``: what the owner of a GPU can find out in half an hour.

``bench`` has the sizes and the instruments, ``kernels``, ``costs`` and ``training`` the phases,
``phases`` runs them one by one and resumes, ``page`` shows what came out. On the CPU the same code
runs at toy size, with clocks in the place of events.
"""
