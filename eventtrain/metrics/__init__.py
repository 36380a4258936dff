"""Values from self.log(), collected and reduced."""
