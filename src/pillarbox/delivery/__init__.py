"""When and what to send: decisions are pure (`policy`, `backoff`), one loop (`worker`) acts."""
