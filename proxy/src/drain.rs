//! Draining: stop accepting, let requests finish, cut what is left.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// How far the proxy's end has come. Clones tell the same.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    accepting: CancellationToken,
    handed_over: CancellationToken,
    cut: CancellationToken,
}

impl Drain {
    /// Nothing is drained yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether new connections are taken no more. From then on HTTP/1 responses carry `connection: close` and
    /// HTTP/2 connections a GOAWAY.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.accepting.is_cancelled()
    }

    /// Ends when the first step begins.
    pub async fn draining(&self) {
        self.accepting.cancelled().await;
    }

    /// Ends when connections must be closed, whatever they are doing.
    pub async fn cut(&self) {
        self.cut.cancelled().await;
    }

    /// Whether connections must be closed, whatever they are doing.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.cut.is_cancelled()
    }

    /// Listening sockets are somebody else's from now on: the drain stops accepting on them and leaves them open.
    pub fn leave_sockets_open(&self) {
        self.handed_over.cancel();
    }

    /// Whether listening sockets stay open at the end.
    #[must_use]
    pub fn leaves_sockets_open(&self) -> bool {
        self.handed_over.is_cancelled()
    }

    /// The first step: accept nothing more.
    pub fn stop_accepting(&self) {
        self.accepting.cancel();
    }

    /// The last step: close everything.
    pub fn cut_now(&self) {
        self.accepting.cancel();
        self.cut.cancel();
    }

    /// All steps: accept nothing more, give what is open up to `grace` to end, then cut it. `idle` ends when nothing
    /// is open any more; this returns when it has.
    pub async fn shut_down<F: Future<Output = ()>>(&self, grace: Duration, idle: F) {
        self.stop_accepting();
        tokio::pin!(idle);
        if tokio::time::timeout(grace, &mut idle).await.is_err() {
            tracing::warn!(grace_ms = grace.as_millis(), "drain deadline passed, closing connections");
            self.cut_now();
            idle.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_ends_in_time_is_not_cut() {
        let drain = Drain::new();
        let idle = tokio::time::sleep(Duration::from_secs(1));
        drain.shut_down(Duration::from_secs(5), idle).await;
        assert!(drain.is_draining() && !drain.is_cut());
    }

    #[tokio::test(start_paused = true)]
    async fn what_does_not_end_is_cut_at_the_deadline() {
        let drain = Drain::new();
        let open = drain.clone();
        let start = tokio::time::Instant::now();
        drain.shut_down(Duration::from_secs(5), async move { open.cut().await }).await;
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        assert!(drain.is_cut());
    }
}
