"""Open-loop load on any OpenAI-compatible server: what is sent when, how it is sent, and what came of it."""
