"""Every reach past a library's public interface, in one place."""
