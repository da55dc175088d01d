"""/v1/sessions: texts that the server stores, so that they can be continued."""
