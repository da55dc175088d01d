"""Generating text: completions of prompts, scores of candidates, searches, and all operations on sessions.

This package joins sessions to the engine: each operation is a change that a `SessionStore` applies and saves, and the
engine of a `LoadedModel` computes the texts. `Reader` is the only code that makes a `Text` longer or shorter. The
package must not know HTTP, and it reaches Redis only through `SessionStore`.

What happens when a client that lost its stream on replica A resumes it on replica B (`GET /v1/sessions/ID/generate`):

1. B calls `RunRegistry.resume`. That loads the session and refuses what it can't continue, for example without the
   session's model, so that a refusal ends no stream. Then it stops a run of this session in B itself
   (`ActiveRun.stop`), and calls `SessionStore.begin(take_over=True)`, which leases the session, submits the run to B's
   engine and saves.
2. If A's run is still active, this lease request sets the session's takeover flag in Redis (`session.lua`) and is
   repeated until the lease is free. The next renewal by A's `LeaseRenewer` thread finds the flag and calls
   `lease.on_takeover`, which is A's `ActiveRun.stop`.
3. A's `ActiveRun.stop` cancels the text in the engine, and saves the session as far as it was generated, with an
   unfinished `Run`; the same call releases the lease. A connection that still reads A's stream gets RunTakenOver.
4. If A is dead, its lease ends by itself, and Redis has the record that A's `RunRegistry` saved last: its thread saves
   each active run once a second (`ActiveRun.save_progress`), as far as its stream was sent.
5. B has the lease and the last record. If the run is finished, its `RunStream` sends stored text only. Otherwise the
   engine of B continues it (`Reader.remaining_request`). The same model, state, settings, form and seed give the
   same characters.
6. B's `RunStream` sends each character after the client's position once: first those of the record, then those that
   its own `ActiveRun` generates. It skips characters up to that position, which A had sent but not saved.

A run of at most 256 characters that is not streamed is a change like a feed: nobody receives a part of it, so it has no
lease, no `ActiveRun`, and no save before its end.

Feed, rewind, fork and generate on B need no resume before them: `Reader.replay` first generates again what A sent and
did not save, up to the position that the client names. While A's run is active they raise SessionBusy, except that a
repeated generate resumes the run that it started.
"""
