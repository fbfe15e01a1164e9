"""Conversations: messages of any API, the chat templates that render them, and where templates come from."""
