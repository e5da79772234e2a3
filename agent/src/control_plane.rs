//! The way to the control plane: connections with the current certificate, and whose turn it is to be asked.

use std::time::Duration;

use ca::identity::SpiffeId;
use ca::tls::{ExpectedIdentities, IdentityWatch};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;
use wire::mesh::workload_service_client::WorkloadServiceClient;

/// The shortest and the longest pause after a member could not be asked.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// A connection to one member.
pub(crate) type Client = WorkloadServiceClient<Channel>;

/// The control plane, called with the current certificate.
#[derive(Debug, Clone)]
pub struct ControlPlane {
    members: watch::Receiver<Vec<String>>,
    identity: IdentityWatch,
}

impl ControlPlane {
    /// A control plane of these members (`host:port`), the preferred one first.
    #[must_use]
    pub fn new(members: watch::Receiver<Vec<String>>, identity: IdentityWatch) -> Self {
        Self { members, identity }
    }

    /// A connection to the member whose turn it is.
    pub(crate) async fn client(&self, turn: usize) -> Result<Client, Status> {
        let endpoint = {
            let members = self.members.borrow();
            turn.checked_rem(members.len()).and_then(|index| members.get(index)).cloned()
        };
        let endpoint =
            &endpoint.ok_or_else(|| Status::failed_precondition("no address of a control plane"))?;
        let control_plane = SpiffeId::control_plane(&self.identity.borrow().spiffe_id.trust_domain());
        let tls =
            ca::tls::client_config(self.identity.clone(), ExpectedIdentities::one(control_plane), &[b"h2"])
                .map_err(|e| Status::internal(e.to_string()))?;
        let channel = ca::client::connect(endpoint, tls).await.map_err(Status::unavailable)?;
        Ok(Client::new(channel))
    }

    /// Has `listener` listen to one member after the other, to each for as long as it answers; until `stop`.
    pub(crate) async fn follow(&self, listener: &impl Listener, stop: &CancellationToken) {
        let (mut turns, mut rng) = (Turns::new(), fastrand::Rng::new());
        loop {
            let mut heard = false;
            let listening = async { listener.listen(self.client(turns.turn).await?, &mut heard).await };
            let Some(ended) = stop.run_until_cancelled(listening).await else { return };
            if let Err(status) = ended {
                tracing::debug!(error = status.message(), "nobody tells the {}", listener.what());
            }
            let pause = turns.ended(heard, &mut rng);
            if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                return;
            }
        }
    }

    pub(crate) fn namespace_and_account(&self) -> (String, String) {
        let identity = self.identity.borrow();
        let (namespace, account) = identity.spiffe_id.workload_parts().unwrap_or_default();
        (namespace.to_owned(), account.to_owned())
    }
}

/// Who wants to know something of the control plane, always the latest.
pub(crate) trait Listener: Sync {
    /// What that is, for the log.
    fn what(&self) -> &'static str;

    /// Listens to a member until it ends; `heard` becomes true when it has said something.
    fn listen(&self, client: Client, heard: &mut bool) -> impl Future<Output = Result<(), Status>> + Send;
}

/// Whose turn it is among the members: the preferred one's, and after each that says nothing the next one's, with pauses
/// that double.
#[derive(Debug)]
struct Turns {
    turn: usize,
    pause: Duration,
}

impl Turns {
    /// The preferred member first.
    fn new() -> Self {
        Self { turn: 0, pause: PAUSE.0 }
    }

    /// The member ends, having said something (`heard`) or nothing: the pause before the next one, half of it by chance.
    fn ended(&mut self, heard: bool, rng: &mut fastrand::Rng) -> Duration {
        (self.turn, self.pause) =
            if heard { (0, PAUSE.0) } else { (self.turn.wrapping_add(1), (self.pause * 2).min(PAUSE.1)) };
        self.pause.mul_f64(0.5 + rng.f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_says_nothing_is_followed_by_the_next_and_who_was_heard_by_the_preferred() {
        let (mut turns, mut rng) = (Turns::new(), fastrand::Rng::with_seed(3));
        for turn in 0..20_u32 {
            assert_eq!(turns.turn, turn as usize);
            let longest = (PAUSE.0 * 2_u32.saturating_pow(turn + 1)).min(PAUSE.1);
            let pause = turns.ended(false, &mut rng);
            assert!(pause >= longest / 2 && pause <= longest, "{turn}: {pause:?}");
        }
        assert!(turns.ended(true, &mut rng) <= PAUSE.0);
        assert_eq!(turns.turn, 0);
    }
}
