"""The wire's shapes over HTTP: requests are strict, answers follow OpenAI."""
