//! `istiod run`: a member as it is set up for good, with an authority plugged in and a closed operator API.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::mesh::{service, strict};
use tests::program::{self, Program};
use tests::tls::{self, Authority};
use tests::workload::{Workload, WorkloadSpec, free_block, own_address};
use tests::{PATIENCE, echo, eventually, http};

/// A member with a trust domain of its own.
struct Member {
    folder: tempfile::TempDir,
    own: Ipv4Addr,
    program: Program,
}

impl Member {
    fn start(root: &Authority) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("mesh-").tempdir()?;
        let own = own_address(free_block()?);
        let plugged = folder.path().join("cacerts");
        std::fs::create_dir(&plugged)?;
        let below = root.below()?;
        for (name, pem) in [
            ("ca-cert.pem", &below.certificate),
            ("ca-key.pem", &below.key),
            ("cert-chain.pem", &below.certificate),
            ("root-cert.pem", &root.certificate),
        ] {
            write_private(&plugged.join(name), pem)?;
        }
        let settings = folder.path().join("istiod.yaml");
        let yaml = format!(
            "dataDir: {}\ntrustDomain: mesh.example\nxds: {{address: '{own}:15012'}}\nadmin: {{address: '{own}:15080'}}\n\
             metrics: {{address: '{own}:15014'}}\nca: {{directory: {}, leafLifetime: 1h}}\n",
            folder.path().join("data").display(),
            plugged.display()
        );
        std::fs::write(&settings, yaml)?;
        let args = ["run".to_owned(), "--config".to_owned(), settings.display().to_string()];
        let program = Program::start(&program::ours("istiod")?, folder.path(), "istiod", &args)?;
        Ok(Self { folder, own, program })
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("cacerts/root-cert.pem")
    }

    fn istioctl(&self, args: &[&str]) -> anyhow::Result<(i32, String, String)> {
        let url = format!("https://{}:15080", self.own);
        let (token, root) = (self.folder.path().join("data/operator/admin-token"), self.root());
        let (token, root) = (token.display().to_string(), root.display().to_string());
        let envs =
            [("ISTIOCTL_SERVER", url.as_str()), ("ISTIOCTL_TOKEN_FILE", &token), ("ISTIOCTL_CA", &root)];
        program::run("istioctl", &envs, args)
    }

    fn istioctl_ok(&self, args: &[&str]) -> anyhow::Result<String> {
        let (code, out, err) = self.istioctl(args)?;
        ensure!(code == 0, "{args:?}: {code}: {err}{out}{}", self.program.output());
        Ok(out)
    }
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, text)?;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_signs_below_the_plugged_in_root_and_serves_operators_over_tls() -> anyhow::Result<()> {
    let root = Authority::new()?;
    let mut member = Member::start(&root)?;
    let version =
        eventually(PATIENCE, "the member answers", || async { member.istioctl_ok(&["version"]) }).await?;
    ensure!(version.contains("mesh.example"), "{version}");
    member.program.check()?;

    // Nobody but who has the token, and nobody without TLS.
    let url = format!("https://{}:15080", member.own);
    let ca = member.root().display().to_string();
    let (code, _, err) =
        program::run("istioctl", &[("ISTIOCTL_SERVER", &url), ("ISTIOCTL_CA", &ca)], &["get", "all"])?;
    ensure!(code == 1, "without a token: {code}: {err}");
    let other = member.folder.path().join("other.pem");
    std::fs::write(&other, Authority::new()?.certificate)?;
    let (code, _, err) = member.istioctl(&["--ca", &other.display().to_string(), "get", "all"])?;
    ensure!(code == 1, "with another root: {code}: {err}");
    let plain = http::get(SocketAddr::from((member.own, 15080)), "istiod", "/api/v1/version", &[]).await;
    ensure!(plain.is_err(), "plaintext: {plain:?}");

    let file = member.folder.path().join("mesh.yaml");
    std::fs::write(&file, strict().to_owned() + &service("echo"))?;
    member.istioctl_ok(&["apply", "-f", &file.display().to_string()])?;
    let app = echo::Echo::start("echo-v1").await?;
    let spec = WorkloadSpec::server("echo", "v1", app.address);
    let token = member.istioctl_ok(&["token", "create", "--service-account", "echo"])?;
    let workload = Workload::start_with(member.folder.path(), &spec, token.trim())?;
    let inbound = workload.inbound(80);
    let known = root.issue("spiffe://mesh.example/ns/default/sa/client")?;
    eventually(PATIENCE, "the workload serves", || async {
        let ready = http::get(workload.inbound(15021), "proxy", "/healthz/ready", &[]).await?;
        ensure!(ready.status == 200, "{ready:?}");
        Ok(())
    })
    .await?;
    let answer = eventually(PATIENCE, "a client of the trust domain is served", || async {
        let again = tls::Credentials { chain: known.chain.clone(), key: known.key.clone_key() };
        tls::get(inbound, Some(again), "echo").await
    })
    .await?;
    let seen: echo::Seen = answer.json()?;
    ensure!(
        seen.header("x-forwarded-client-cert").contains("spiffe://mesh.example/ns/default/sa/client"),
        "{seen:?}"
    );
    // Proxies of the mesh accept each other in its own trust domain.
    let token = member.istioctl_ok(&["token", "create", "--service-account", "client"])?;
    let client = Workload::start_with(member.folder.path(), &WorkloadSpec::client("client"), token.trim())?;
    let services: Value = serde_json::from_str(&member.istioctl_ok(&["services", "-o", "json"])?)?;
    let index = services.pointer("/0/vipIndex").and_then(Value::as_u64).context("no index")?;
    let vip = xds::translate::names::block_address(client.block, 20, u32::try_from(index)?);
    let vip = SocketAddr::from((vip.context("the block is too small")?, 80));
    eventually(PATIENCE, "a proxy of the trust domain is served", || async {
        let answer = http::get(vip, "echo", "/", &[]).await?;
        ensure!(answer.status == 200, "{answer:?}{}", client.agent.output());
        Ok(())
    })
    .await?;
    // The same root, and yet another mesh.
    let foreign = root.issue("spiffe://other.example/ns/default/sa/client")?;
    let refused = tls::get(inbound, Some(foreign), "echo").await;
    ensure!(refused.is_err(), "another trust domain was answered: {refused:?}");
    ensure!(member.program.stop().await?.success(), "{}", member.program.output());
    Ok(())
}

#[test]
fn wrong_settings_stop_the_start_with_all_their_mistakes() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("istiod.yaml");
    std::fs::write(&file, "xds: {address: here}\nfrobnicate: 1\n")?;
    let (code, out, err) = program::run("istiod", &[], &["run", "--config", &file.display().to_string()])?;
    let told = out + &err;
    ensure!(code == 64, "{code}: {told}");
    for mistake in ["dataDir", "xds.address", "frobnicate"] {
        ensure!(told.contains(mistake), "{mistake} is not in {told}");
    }
    Ok(())
}
