"""What `cadtrain data inspect` shows: tables in a terminal, a page of HTML."""
