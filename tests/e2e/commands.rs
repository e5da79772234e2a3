//! Every command of `istioctl` against a running mesh.

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::mesh::{Mesh, routes, service};
use tests::{program, text};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_are_applied_shown_deleted_and_remembered() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &[], &[]).await?;
    let istiod = &mesh.istiod;
    let file = mesh.folder().join("mesh.yaml");
    let path = file.display().to_string();
    std::fs::write(&file, service("web") + &routes("web", "  - route: [{destination: {host: web}}]"))?;
    let dry = istiod.istioctl_ok(&["apply", "--dry-run", "-f", &path]).await?;
    ensure!(
        dry.contains("dry run")
            && !istiod.istioctl_ok(&["get", "vs", "-o", "json"]).await?.contains("\"web\""),
        "{dry}"
    );
    let created = istiod.istioctl_ok(&["apply", "-f", &path]).await?;
    ensure!(created.contains("VirtualService default/web created"), "{created}");
    let again = istiod.istioctl_ok(&["apply", "-f", &path]).await?;
    ensure!(again.contains("VirtualService default/web unchanged"), "{again}");

    for kind in ["virtualservice", "vs", "VirtualService", "virtualservices", "all"] {
        let list: Value = serde_json::from_str(&istiod.istioctl_ok(&["get", kind, "-o", "json"]).await?)?;
        ensure!(text(&list, "/kind") == "List" && text(&list, "/apiVersion") == "v1", "{list}");
        let items = list.get("items").and_then(Value::as_array).context("no items")?;
        let web = items
            .iter()
            .find(|i| text(i, "/kind") == "VirtualService")
            .with_context(|| format!("{kind}: {list}"))?;
        ensure!(text(web, "/metadata/resourceVersion").parse::<u64>()? > 0, "{web}");
        ensure!(text(web, "/spec/hosts/0") == "web", "{web}");
    }
    let one = istiod.istioctl_ok(&["get", "vs", "web", "-o", "yaml"]).await?;
    ensure!(one.contains("kind: VirtualService") && one.contains("resourceVersion"), "{one}");
    let table = istiod.istioctl_ok(&["get", "vs"]).await?;
    ensure!(table.to_lowercase().contains("revision") && table.contains("web"), "{table}");

    let deleted = istiod.istioctl_ok(&["delete", "vs", "web", "--wait"]).await?;
    ensure!(deleted.contains("VirtualService default/web deleted"), "{deleted}");
    let (code, _, err) = istiod.istioctl(&["delete", "vs", "web"]).await?;
    ensure!(code == 1 && err.contains("web"), "{code}: {err}");
    let (code, _, err) = istiod.istioctl(&["get", "vs", "web"]).await?;
    ensure!(code == 1 && err.contains("web"), "{code}: {err}");
    let (code, _, err) = istiod.istioctl(&["get", "nonsense"]).await?;
    ensure!(code != 0 && err.contains("nonsense"), "{code}: {err}");

    let history: Value = serde_json::from_str(&istiod.istioctl_ok(&["history", "-o", "json"]).await?)?;
    let entries = history.as_array().context("no history")?;
    let changes = |index: usize| {
        entries.get(index).and_then(|e| e.get("changes")).map(ToString::to_string).unwrap_or_default()
    };
    ensure!(changes(0).contains("-VirtualService/default/web"), "{history}");
    ensure!(changes(1).contains("+VirtualService/default/web"), "{history}");
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mistakes_are_told_with_their_place_and_by_the_exit_code() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &[], &[]).await?;
    let (good, bad) = (mesh.folder().join("good.yaml"), mesh.folder().join("bad.yaml"));
    std::fs::write(&good, service("web"))?;
    std::fs::write(&bad, routes("web", "  - route: [{destination: {hots: web}}]\n    timeout: soon"))?;
    let (good, bad) = (good.display().to_string(), bad.display().to_string());

    let (code, out, err) = mesh.istiod.istioctl(&["validate", "-f", &good]).await?;
    ensure!(code == 0 && out.contains("1 object(s)"), "{code}: {out}{err}");
    for command in [&["validate", "-f", &bad][..], &["apply", "-f", &good, "-f", &bad]] {
        let (code, out, err) = mesh.istiod.istioctl(command).await?;
        ensure!(code == 1, "{command:?}: {code}: {out}{err}");
        ensure!(err.contains("bad.yaml:7") && err.contains("hots"), "{command:?}: {err}");
        ensure!(err.contains("bad.yaml:8") && err.contains("timeout"), "{command:?}: {err}");
    }
    let all = mesh.istiod.istioctl_ok(&["get", "all", "-A", "-o", "json"]).await?;
    ensure!(!all.contains("\"web\""), "half of an apply was committed: {all}");
    for wrong in [&["apply"][..], &["get"], &["frobnicate"], &["get", "vs", "-o", "xml"]] {
        let (code, _, err) = mesh.istiod.istioctl(wrong).await?;
        ensure!(code == 2, "{wrong:?}: {code}: {err}");
    }
    let (code, _, err) =
        program::run("istioctl", &[("ISTIOCTL_SERVER", "http://127.0.0.1:9")], &["get", "vs"])?;
    ensure!(code == 1 && err.contains("127.0.0.1:9"), "{code}: {err}");
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_mesh_and_its_proxies_are_shown() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &["echo-v1"], &["client"]).await?;
    let istiod = &mesh.istiod;
    for (command, expected) in [
        (&["services"][..], &["echo.default.svc.cluster.local", "80/HTTP", "1/1"][..]),
        (&["workloads"], &["echo-v1", "Healthy"]),
        (&["proxy-status"], &["client.default", "echo-v1.default", "SYNCED"]),
        (&["proxy-status", "-o", "wide"], &["spiffe://cluster.local/ns/default/sa/client", "delta"]),
        (&["proxy-config", "cluster", "client"], &["outbound|80||echo.default.svc.cluster.local"]),
        (&["proxy-config", "endpoint", "client"], &["outbound|80||echo.default.svc.cluster.local"]),
        (&["proxy-config", "route", "client"], &["echo.default.svc.cluster.local"]),
        (&["proxy-config", "listener", "client"], &["_80"]),
        (&["proxy-config", "all", "echo-v1.default"], &["inbound|80||", "envoy.transport_sockets.tls"]),
        (&["version"], &["istioctl", "istiod", "cluster.local", "leader"]),
        (&["completion", "bash"], &["_istioctl"]),
        (&["completion", "zsh"], &["#compdef istioctl"]),
    ] {
        let out = istiod.istioctl_ok(command).await?;
        ensure!(expected.iter().all(|e| out.contains(e)), "{command:?}: {out}");
    }
    for command in
        [&["services"][..], &["workloads"], &["proxy-status"], &["version"], &["history"], &["token", "list"]]
    {
        for format in ["json", "yaml"] {
            let out = istiod.istioctl_ok(&[command, &["-o", format]].concat()).await?;
            ensure!(
                format == "yaml" || serde_json::from_str::<Value>(&out).is_ok(),
                "{command:?} -o {format}: {out}"
            );
        }
    }
    let (code, _, err) = istiod.istioctl(&["proxy-config", "cluster", "nobody"]).await?;
    ensure!(code == 1 && err.contains("nobody") && err.contains("client.default"), "{code}: {err}");
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_made_listed_and_revoked() -> anyhow::Result<()> {
    let mesh = Mesh::start(&[], &[], &[]).await?;
    let istiod = &mesh.istiod;
    let created = istiod.istioctl_ok(&["token", "create", "--service-account", "web", "-o", "json"]).await?;
    let created: Value = serde_json::from_str(&created)?;
    let (id, secret) = (text(&created, "/id").to_owned(), text(&created, "/token").to_owned());
    let list = istiod.istioctl_ok(&["token", "list"]).await?;
    ensure!(list.contains(&id) && list.contains("web") && !list.contains(&secret), "{list}");
    istiod.istioctl_ok(&["token", "revoke", &id]).await?;
    ensure!(!istiod.istioctl_ok(&["token", "list"]).await?.contains(&id), "still listed");
    let spec = tests::workload::WorkloadSpec::client("web");
    let mut late = tests::workload::Workload::start_with(mesh.folder(), &spec, &secret)?;
    ensure!(!late.agent.ended().await?.success(), "a revoked token let a workload in");
    mesh.finish(&["token", "the agent ends", "certificate"])
}
