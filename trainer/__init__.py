"""From labelled cases to an adapter that beats its parent."""
