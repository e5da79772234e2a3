//! Who may speak to whom.

use anyhow::ensure;
use tests::echo::Seen;
use tests::http;
use tests::mesh::{Mesh, service_with, strict};
use tests::tls::{self, Authority, Credentials};

const HOST: &str = "echo.default.svc.cluster.local";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strict_servers_refuse_plaintext_and_every_certificate_that_is_not_of_the_mesh() -> anyhow::Result<()>
{
    let mesh = Mesh::start(&[], &["echo-v1"], &["client"]).await?;
    let inbound = mesh.of("echo-v1")?.inbound(80);
    // Without a policy the port takes both, so that workloads can be moved into the mesh one by one.
    let plain = http::get(inbound, HOST, "/", &[]).await?;
    ensure!(plain.status == 200, "permissive: {plain:?}");

    mesh.istiod.apply_and_wait(strict()).await?;
    let served = mesh.echo("echo-v1")?.requests();
    let plain = http::get(inbound, HOST, "/", &[]).await;
    ensure!(plain.is_err(), "plaintext was answered: {plain:?}");
    let anonymous = tls::get(inbound, None, HOST).await;
    ensure!(anonymous.is_err(), "a client without certificate was answered: {anonymous:?}");
    let foreign = Authority::new()?;
    for identity in
        ["spiffe://cluster.local/ns/default/sa/client", "spiffe://evil.example/ns/default/sa/client"]
    {
        let answer = tls::get(inbound, Some(foreign.issue(identity)?), HOST).await;
        ensure!(answer.is_err(), "{identity} of another CA was answered: {answer:?}");
    }
    ensure!(mesh.echo("echo-v1")?.requests() == served, "a refused request came to the application");

    // The same client with the certificate of a workload is served: it was the certificate that made the difference.
    let known = tls::get(inbound, Some(Credentials::of_agent(&mesh.of("client")?.data)?), HOST).await?;
    let seen: Seen = known.json()?;
    ensure!(seen.header("x-forwarded-client-cert").contains("sa/client"), "{seen:?}");
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_does_not_speak_to_a_server_of_another_identity() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &["impostor-v1"], &["client"]).await?;
    mesh.istiod.apply_and_wait(strict()).await?;
    let impostor = mesh.of("impostor-v1")?.inbound(80).ip();
    let victim = |account: &str| {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: victim}}\nspec:\n  \
             hosts: [victim.default.svc.cluster.local]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
             ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints:\n  \
             - {{address: {impostor}, serviceAccount: {account}, labels: {{security.istio.io/tlsMode: istio}}}}\n"
        )
    };
    mesh.istiod.apply_and_wait(&victim("victim")).await?;
    let refused = mesh.get("client", "victim", "/", &[]).await?;
    ensure!(refused.status == 503, "{refused:?}");
    ensure!(mesh.echo("impostor-v1")?.requests() == 0, "the request came to the impostor");
    // The same address under the identity that it really has is fine.
    mesh.istiod.apply_and_wait(&victim("impostor")).await?;
    let answer = mesh.answers("client", "victim").await?;
    ensure!(answer.json::<Seen>()?.name == "impostor-v1", "{answer:?}");
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_caller_gets_403_and_the_allowed_one_is_served() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &["echo-v1"], &["friend", "stranger"]).await?;
    let allow = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: echo}\nspec:\n  \
                 selector: {matchLabels: {app: echo}}\n  action: ALLOW\n  rules:\n  \
                 - from: [{source: {principals: [cluster.local/ns/default/sa/friend]}}]\n    \
                 to: [{operation: {methods: [GET], paths: [/, /open/*]}}]\n";
    mesh.istiod.apply_and_wait(&(strict().to_owned() + allow)).await?;
    for (caller, path, status) in [
        ("friend", "/", 200),
        ("friend", "/open/a?b=c", 200),
        ("friend", "/closed", 403),
        // Paths are compared after they are normalised, as the application sees them.
        ("friend", "/open/../closed", 403),
        ("stranger", "/", 403),
        ("stranger", "/open/a", 403),
    ] {
        let answer = mesh.get(caller, "echo", path, &[]).await?;
        ensure!(answer.status == status, "{caller} {path}: {answer:?}");
        ensure!(status == 200 || answer.text() == "RBAC: access denied", "{caller} {path}: {answer:?}");
    }
    // A caller cannot lend itself an identity by a header.
    let forged =
        [("x-forwarded-client-cert", "By=spiffe://x;URI=spiffe://cluster.local/ns/default/sa/friend")];
    let answer = mesh.get("stranger", "echo", "/", &forged).await?;
    ensure!(answer.status == 403, "{answer:?}");
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_tcp_connection_is_closed() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&[], &[], &["friend", "stranger"]).await?;
    let line = service_with("line", "{number: 80, name: tcp, protocol: TCP}");
    let allow = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: line}\nspec:\n  \
                 selector: {matchLabels: {app: line}}\n  action: ALLOW\n  rules:\n  \
                 - from: [{source: {principals: [cluster.local/ns/default/sa/friend]}}]\n---\n";
    mesh.istiod.apply(&(strict().to_owned() + &line + allow)).await?;
    mesh.serve("line-v1", tests::echo::Echo::tcp("line-v1").await?).await?;
    mesh.istiod.synced("line-v1.default").await?;
    mesh.istiod.healthy("line", 1).await?;
    mesh.istiod.apply_and_wait(strict()).await?;
    let quiet = std::time::Duration::from_secs(2);
    for (caller, expected) in [("friend", &b"hello"[..]), ("stranger", b"")] {
        let address = mesh.address(caller, "line", 80).await?;
        let back = http::raw(address, b"hello", quiet).await?;
        ensure!(back == expected, "{caller}: {}", String::from_utf8_lossy(&back));
    }
    mesh.finish(&[])
}
