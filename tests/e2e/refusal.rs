//! A proxy that cannot use what it is given says which resource, keeps what it has, and the operator is told.

use std::net::TcpListener;

use anyhow::ensure;
use serde_json::Value;
use tests::mesh::{Mesh, routes, service_with};
use tests::{PATIENCE, eventually, text};

const ONE: &str = "{number: 80, name: http, protocol: HTTP}";
const TWO: &str = "{number: 80, name: http, protocol: HTTP}, {number: 81, name: http-more, protocol: HTTP}";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_on_a_taken_address_is_refused_by_name_and_everything_else_goes_on() -> anyhow::Result<()>
{
    let mesh = Mesh::start(&[], &["echo-v1"], &["client", "other"]).await?;
    mesh.answers("client", "echo").await?;
    // The address at which the client's proxy would listen for the service's second port.
    let occupied = mesh.address("client", "echo", 81).await?;
    let occupant = TcpListener::bind(occupied)?;
    let file = mesh.folder().join("two-ports.yaml");
    std::fs::write(&file, service_with("echo", TWO))?;
    let path = file.display().to_string();

    let (code, out, err) = mesh.istiod.istioctl(&["apply", "--wait", "--timeout", "5s", "-f", &path]).await?;
    ensure!(code == 1, "exit code {code}: {out}{err}");
    ensure!(err.contains("client.default") && !err.contains("other.default"), "{err}");
    let listener = format!("{}_81", occupied.ip());
    ensure!(err.contains("LDS") && err.contains(&listener), "the resource {listener} is not named: {err}");
    ensure!(err.to_lowercase().contains("in use"), "the reason is not told: {err}");

    let row = mesh.istiod.proxy("client.default").await?;
    ensure!(text(&row, "/types/LDS") == "NACKED", "{row}");
    ensure!(text(&row, "/rejected/0/error").contains(&listener), "{row}");
    let status = mesh.istiod.istioctl_ok(&["proxy-status"]).await?;
    ensure!(status.contains("NACKED"), "{status}");
    let reject: f64 = mesh.istiod.metric("pilot_total_xds_rejects", "").await?;
    ensure!(reject >= 1.0, "pilot_total_xds_rejects is {reject}");

    // The last good configuration serves, and other resources still change.
    mesh.answers("client", "echo").await?;
    mesh.istiod.apply(&routes("echo", "  - directResponse: {status: 299, body: {string: changed}}")).await?;
    eventually(PATIENCE, "a route changes beside the refused listener", || async {
        let answer = mesh.get("client", "echo", "/", &[]).await?;
        ensure!(answer.status == 299, "{answer:?}");
        Ok(())
    })
    .await?;

    // Without the bad resource the proxy is whole again, and says so.
    drop(occupant);
    std::fs::write(&file, service_with("echo", ONE))?;
    let (code, out, err) =
        mesh.istiod.istioctl(&["apply", "--wait", "--timeout", "10s", "-f", &path]).await?;
    ensure!(code == 0, "exit code {code}: {out}{err}");
    let row: Value = mesh.istiod.proxy("client.default").await?;
    ensure!(text(&row, "/types/LDS") == "SYNCED", "{row}");
    mesh.finish(&["in use", "reject", "refuse"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_ends_at_its_timeout_and_names_a_proxy_that_does_not_answer() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &["echo-v1"], &["client"]).await?;
    let stopped = nix::unistd::Pid::from_raw(i32::try_from(mesh.of("client")?.agent.pid())?);
    nix::sys::signal::kill(stopped, nix::sys::signal::Signal::SIGSTOP)?;
    let file = mesh.folder().join("routes.yaml");
    std::fs::write(&file, routes("echo", "  - directResponse: {status: 299}"))?;
    let path = file.display().to_string();
    let outcome = mesh.istiod.istioctl(&["apply", "--wait", "--timeout", "700ms", "-f", &path]).await;
    nix::sys::signal::kill(stopped, nix::sys::signal::Signal::SIGCONT)?;
    let (code, out, err) = outcome?;
    ensure!(code == 1 && err.contains("client.default"), "exit code {code}: {out}{err}");
    eventually(PATIENCE, "the proxy catches up", || async {
        let answer = mesh.get("client", "echo", "/", &[]).await?;
        ensure!(answer.status == 299, "{answer:?}");
        Ok(())
    })
    .await?;
    mesh.finish(&[])
}
