"""The web page: chat and vote in a browser, and the operator's board. `chat web` serves it.

Every page is complete HTML rendered from the server's record, and every action is a form. One small script submits the
forms without leaving the page and follows answers while they are written. Without the script the page works the same,
but needs reloads.
"""
