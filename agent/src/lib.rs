//! The node agent: what runs beside an application so that it is a member of the mesh.
//!
//! [`cli`] says what can be asked of it; [`join`] gets the identity, with a token the first time; [`members`] follows
//! who the members of the control plane are; [`register`] makes the workload an endpoint and says when it may be sent
//! traffic; [`secrets`] hands the certificate to a stock Envoy; [`capture`] redirects a machine's traffic to the proxy.
//! The proxy itself is the crate `proxy`, run in this process.

pub mod capture;
pub mod cli;
pub mod config;
pub mod join;
pub mod members;
pub mod register;
pub mod secrets;

use proxy::Proxy;
use proxy::telemetry::LogLevel;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use config::{Config, Seat};

/// Runs the agent until `stop`: identity, then the data plane and the registration; backwards at the end. `log` lets
/// the proxy's admin port change the level of the log.
///
/// # Errors
///
/// When there is no identity to be had, or the data plane cannot start. What fails later is tried again.
pub async fn run(config: Config, log: Option<LogLevel>, stop: CancellationToken) -> anyhow::Result<()> {
    let tasks = TaskTracker::new();
    // The identity is renewed until the data plane has drained.
    let ended = CancellationToken::new();
    let joined = join::identity(&config, &tasks, ended.clone()).await?;
    let members = joined.members.list();
    let control_plane = register::ControlPlane::new(members.clone(), joined.identity.clone());
    tasks.spawn(joined.members.follow(control_plane.clone(), ended.clone()));
    let registration = config.workload.map(|workload| register::Registration::new(workload, control_plane));

    let data_plane = CancellationToken::new();
    let drain = data_plane.clone().drop_guard();
    tasks.spawn(async move {
        match registration {
            Some(registration) => registration.keep(stop).await,
            None => stop.cancelled().await,
        }
        drop(drain);
    });
    let outcome = match config.seat {
        Seat::Proxy(proxy) => {
            let config = proxy.config(members, joined.identity)?;
            match Proxy::start(config, log).await {
                Ok(proxy) => {
                    proxy.run(data_plane).await;
                    Ok(())
                }
                Err(error) => Err(error.into()),
            }
        }
        Seat::Secrets { socket } => secrets::serve(&socket, joined.identity, data_plane).await,
    };
    ended.cancel();
    tasks.close();
    if outcome.is_ok() {
        tasks.wait().await;
    }
    outcome
}
