"""The web page: chat and vote in a browser, and the operator's board. `chat web` serves it.

The server renders, the browser places: every page is whole HTML made from the server's record, every action is a form.
One small script sends the forms without leaving the page and follows answers while they are written; without it the
page does the same, a reload at a time.
"""
