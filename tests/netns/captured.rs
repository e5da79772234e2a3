//! Applications that know nothing of the mesh, on machines whose traffic is captured.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, ensure};
use tests::echo::{Echo, Seen};
use tests::mesh::strict;
use tests::netns::{Lan, is_root};
use tests::{PATIENCE, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::machines::{Captured, ControlPlane, folder, get};
use crate::wire::{SETTLE, Tap};

/// Addresses of the service with this number, of each family.
pub(crate) fn vip(v6: bool, number: u8) -> IpAddr {
    if v6 { format!("fd00:200::{number}").parse() } else { format!("10.200.0.{number}").parse() }
        .unwrap_or(IpAddr::from([0, 0, 0, 0]))
}

/// A service of HTTP on port 80, which the application serves on 8080, and of bytes on port 9000.
pub(crate) fn service(name: &str, number: u8) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}}}\nspec:\n  \
         hosts: [{name}.default.svc.cluster.local]\n  addresses: ['{}', '{}']\n  location: MESH_INTERNAL\n  \
         resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 8080}}, \
         {{number: 9000, name: tcp, protocol: TCP}}]\n  workloadSelector: {{labels: {{app: {name}}}}}\n---\n",
        vip(false, number),
        vip(true, number)
    )
}

/// Sends bytes and gives what comes back.
async fn echoed(from: &Captured, to: SocketAddr, text: &str) -> anyhow::Result<String> {
    let exchange = async {
        let mut stream = from.machine.connect(to).await?;
        stream.write_all(text.as_bytes()).await?;
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back).await?;
        anyhow::Ok(String::from_utf8(back)?)
    };
    tokio::time::timeout(PATIENCE, exchange).await.with_context(|| format!("nothing back from {to}"))?
}

/// The application behind a proxy answers those whose traffic is captured, over mTLS, and nobody else.
async fn serves_the_mesh_alone(
    lan: &Lan,
    client: &Captured,
    (server, name, number): (&Captured, &str, u8),
) -> anyhow::Result<()> {
    let own = server.machine.address_of(number == 6);
    // By any address of the service, and by the workload's own.
    for address in [vip(false, number), vip(true, number), own] {
        let to = SocketAddr::new(address, 80);
        let answer = eventually(PATIENCE, "the service answers", || async {
            let answer = client.get(to, name, "/?secret=in-clear-text").await?;
            ensure!(answer.status == 200, "{to}: {answer:?}\n{}", client.agent.output());
            Ok(answer)
        })
        .await?;
        let seen: Seen = answer.json()?;
        ensure!(seen.name == name, "{seen:?}");
        let caller = "spiffe://cluster.local/ns/default/sa/client";
        ensure!(seen.header("x-forwarded-client-cert").contains(caller), "{seen:?}");
    }
    let back = echoed(client, SocketAddr::new(vip(number == 6, number), 9000), "bytes in clear text").await?;
    ensure!(back == "bytes in clear text", "{back}");
    // Without a proxy, nobody is served: neither where the application listens, nor where the proxy does.
    for port in [8080, 9000, 15006] {
        let refused = get(lan.machine(0)?, SocketAddr::new(own, port), name, "/?refused").await;
        ensure!(refused.is_err(), "plain text to port {port} was answered: {refused:?}");
    }
    // An application calls itself as ever.
    let own_app = get(&server.machine, SocketAddr::new(own, 8080), name, "/").await?;
    ensure!(own_app.status == 200, "{own_app:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applications_that_know_nothing_speak_mtls_over_ipv4_and_ipv6() -> anyhow::Result<()> {
    if !is_root() {
        println!("not run: network namespaces need root");
        return Ok(());
    }
    let (lan, folder) = (Lan::new(4)?, folder()?);
    let control_plane = ControlPlane::start(&lan, folder.path(), "").await?;
    control_plane.apply(&(strict().to_owned() + &service("four", 4) + &service("six", 6)))?;

    // Two servers, one of each family, and a client that has both.
    let (client, four, six) = (lan.machine(1)?, lan.machine(2)?, lan.machine(3)?);
    let apps = [
        Echo::on("four", four.listen(false, 8080)?)?,
        Echo::tcp_on("four", four.listen(false, 9000)?)?,
        Echo::on("six", six.listen(true, 8080)?)?,
        Echo::tcp_on("six", six.listen(true, 9000)?)?,
        Echo::on("ssh", four.listen(false, 22)?)?,
        Echo::on("outside", lan.machine(0)?.listen(false, 8000)?)?,
    ];
    let servers = [
        Captured::start(&control_plane, four, "four", &[four.v4.into()], &["--labels", "app=four"])?,
        Captured::start(&control_plane, six, "six", &[six.v6.into()], &["--labels", "app=six"])?,
    ];
    let client = Captured::start(
        &control_plane,
        client,
        "client",
        &[client.v4.into(), client.v6.into()],
        &["--no-register"],
    )?;
    for captured in servers.iter().chain([&client]) {
        captured.ready().await?;
    }

    let tap = Tap::on(lan.machine(0)?)?;
    let [four, six] = &servers;
    serves_the_mesh_alone(&lan, &client, (four, "four", 4)).await?;
    serves_the_mesh_alone(&lan, &client, (six, "six", 6)).await?;
    // What is not of the mesh: in and out, as ever, and in clear text, which shows that the tap sees it.
    let outside =
        client.get(SocketAddr::new(lan.machine(0)?.v4.into(), 8000), "outside", "/?told=to-outside").await?;
    ensure!(outside.json::<Seen>()?.name == "outside", "{outside:?}");
    let ssh = get(lan.machine(0)?, SocketAddr::new(four.machine.v4.into(), 22), "ssh", "/").await?;
    ensure!(ssh.json::<Seen>()?.name == "ssh", "{ssh:?}");
    eventually(SETTLE, "the tap sees what is in clear text", || async {
        ensure!(tap.frames_with("told=to-outside").0 > 0, "{:?}", tap.frames_with("told=to-outside"));
        Ok(())
    })
    .await?;
    for secret in ["secret=in-clear-text", "bytes in clear text"] {
        let (with, all) = tap.frames_with(secret);
        ensure!(with == 0 && all > 50, "{with} of {all} frames have `{secret}`");
    }

    // Released, the machine is as it was before.
    four.release()?;
    ensure!(four.machine.run("nft", &["list", "tables"])?.trim().is_empty(), "rules are left");
    let plain = get(lan.machine(0)?, SocketAddr::new(four.machine.v4.into(), 8080), "four", "/").await?;
    ensure!(plain.json::<Seen>()?.name == "four", "{plain:?}");
    four.release().context("releasing twice does no harm")?;
    for captured in servers.into_iter().chain([client]) {
        let mut agent = captured.agent;
        ensure!(agent.stop().await?.success(), "{}", agent.output());
    }
    drop(apps);
    Ok(())
}
