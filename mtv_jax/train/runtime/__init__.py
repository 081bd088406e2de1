"""Process of a run: signals, watchdog, peers, sessions, prefetch, profiles.

Nothing here knows what is trained. `launch.py` starts runs in processes of
their own, `supervisor.py` restarts one.
"""
