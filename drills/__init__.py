"""Real runs, really killed, damaged and starved, and what came of it.

    python -m mimae.drills                  # all of them; writes docs/reliability.md
    python -m mimae.drills kills saves      # some of them; writes nothing

Needs the package as a checkout. `make test` has a quick version of each.
"""
