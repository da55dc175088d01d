"""Generating text: completions of prompts, and all operations on sessions.

This package joins a session's record to the engine: it leases or compares and saves through a `SessionStore`, and has
the texts computed by the engine of a `LoadedModel`. It must not know HTTP, and it reaches Redis only through
`SessionStore`.

What happens when a client that lost its stream on replica A resumes it on replica B (`GET /v1/sessions/ID/generate`):

1. B calls `RunRegistry.resume`. That stops a run of this session in B itself (`ActiveRun.stop`), and then leases the
   session with `SessionStore.lease(take_over=True)`.
2. If A's run is still active, this lease request sets the session's takeover flag in Redis (`session.lua`) and is
   repeated until the lease is free. The next renewal by A's `LeaseRenewer` thread finds the flag and calls
   `lease.on_takeover`, which is A's `ActiveRun.stop`.
3. A's `ActiveRun.stop` cancels the text in the engine, and saves the session as far as it was generated, with an
   unfinished `Run`; the same call releases the lease. A connection that still reads A's stream gets RunTakenOver.
4. If A is dead, its lease ends by itself, and Redis has the record that `RunRegistry` saved when the run started.
5. B has the lease and the last record. If the run is finished, its `RunStream` sends stored text only. Otherwise the
   engine of B continues it (`remaining_request`): the same model, state, settings and seed give the same characters.
6. B's `RunStream` sends each character after the client's position once: first those of the record, then those that
   its own `ActiveRun` generates. It skips characters up to that position, which A had sent but not saved.

Feed, rewind, fork and generate on B need no resume before them: `replayed` first generates again what A sent and did
not save, up to the position that the client names. While A's run is active they raise SessionBusy, except that a
repeated generate resumes the run that it started.
"""
