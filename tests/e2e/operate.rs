//! What those who run the control plane do: look back, roll back, verify, back up, restore.

use anyhow::{Context, ensure};
use serde_json::Value;
use tests::istiod::Istiod;

fn rule(name: &str, host: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{host: {host}}}\n"
    )
}

fn json(text: &str) -> anyhow::Result<Value> {
    serde_json::from_str(text).with_context(|| text.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_is_pruned_compared_and_rolled_back() -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("mesh-").tempdir()?;
    let istiod = Istiod::start(folder.path(), &[]).await?;
    let files = folder.path().join("files");
    std::fs::create_dir(&files)?;
    let path = files.display().to_string();
    let apply = ["apply", "-f", &path, "--prune", "--applied-set", "shop"];
    std::fs::write(files.join("a.yaml"), rule("a", "one"))?;
    std::fs::write(files.join("b.yaml"), rule("b", "one"))?;
    let first = json(&istiod.istioctl_ok(&[&apply[..], &["-o", "json"]].concat()).await?)?;
    let first = first.get("revision").and_then(Value::as_u64).context("no revision")?.to_string();
    std::fs::remove_file(files.join("b.yaml"))?;
    std::fs::write(files.join("a.yaml"), rule("a", "two"))?;
    let looked = istiod.istioctl_ok(&[&apply[..], &["--dry-run"]].concat()).await?;
    ensure!(looked.contains("shop/b deleted (dry run)") && looked.contains("0 of 0 proxies"), "{looked}");
    let done = istiod.istioctl_ok(&apply).await?;
    ensure!(done.contains("shop/a configured") && done.contains("shop/b deleted"), "{done}");
    let again = istiod.istioctl_ok(&apply).await?;
    ensure!(again.trim() == "DestinationRule shop/a unchanged", "{again}");

    let diff = istiod.istioctl_ok(&["diff", &first]).await?;
    ensure!(diff.contains("-  host: one\n+  host: two\n"), "{diff}");
    ensure!(diff.contains("--- DestinationRule/shop/b") && diff.contains("+++ /dev/null"), "{diff}");
    let then = istiod.istioctl_ok(&["get", "dr", "a", "-n", "shop", "--at", &first, "-o", "yaml"]).await?;
    ensure!(then.contains("host: one"), "{then}");
    let back = istiod.istioctl_ok(&["rollback", "--to", &first]).await?;
    ensure!(back.contains("shop/a configured") && back.contains("shop/b created"), "{back}");
    ensure!(istiod.istioctl_ok(&["diff", &first]).await?.is_empty());
    let kept = istiod.istioctl_ok(&["history", "keep", "--entries", "50", "--age", "30d"]).await?;
    ensure!(kept.contains("50") && kept.contains("2592000s"), "{kept}");
    let (code, _, err) = istiod.istioctl(&["rollback", "--to", "999999"]).await?;
    ensure!(code == 1 && err.contains("has not been made yet"), "{code}: {err}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_audit_trail_is_exported_and_shows_what_was_tampered_with() -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("mesh-").tempdir()?;
    let istiod = Istiod::start(folder.path(), &[]).await?;
    for host in ["one", "two", "three"] {
        istiod.apply(&rule("a", host)).await?;
    }
    let list = istiod.istioctl_ok(&["audit", "list"]).await?;
    ensure!(list.matches("DestinationRule/shop/a").count() == 3 && list.contains("apply"), "{list}");
    let holds = istiod.istioctl_ok(&["audit", "verify"]).await?;
    let hash = holds.trim().rsplit(' ').next().context("no hash")?.to_owned();
    ensure!(holds.contains("the audit trail holds") && hash.len() == 64, "{holds}");
    let file = folder.path().join("audit.jsonl");
    let path = file.display().to_string();
    istiod.istioctl_ok(&["audit", "export", &path]).await?;
    istiod.istioctl_ok(&["audit", "verify", "--file", &path, "--contains", &hash]).await?;

    let text = std::fs::read_to_string(&file)?;
    let verify = ["audit", "verify", "--file", &path, "--contains", &hash];
    let lines: Vec<&str> = text.lines().collect();
    let cut = lines.get(..lines.len() - 1).context("no lines")?.join("\n");
    for (what, changed) in [
        ("a name", text.replacen("shop/a", "shop/b", 1)),
        (
            "a line left out",
            lines.iter().enumerate().filter(|(n, _)| *n != 2).map(|(_, l)| *l).collect::<Vec<_>>().join("\n"),
        ),
        ("the end", cut),
    ] {
        std::fs::write(&file, changed)?;
        let (code, _, err) = istiod.istioctl(&verify).await?;
        ensure!(code == 1 && err.contains("error:"), "{what}: {code}: {err}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_begins_a_new_cluster_with_the_same_mesh_and_root() -> anyhow::Result<()> {
    let (old, new) = (
        tempfile::Builder::new().prefix("mesh-").tempdir()?,
        tempfile::Builder::new().prefix("mesh-").tempdir()?,
    );
    let istiod = Istiod::start(old.path(), &[]).await?;
    for host in ["one", "two"] {
        istiod.apply(&rule("a", host)).await?;
    }
    istiod.istioctl_ok(&["token", "create", "-n", "shop"]).await?;
    let (file, words) = (old.path().join("mesh.backup"), old.path().join("words"));
    std::fs::write(&words, "correct horse battery\n")?;
    let [file, words, data, fresh] =
        [&file, &words, &old.path().join("istiod-data"), &new.path().join("istiod-data")]
            .map(|p| p.display().to_string());
    istiod.istioctl_ok(&["backup", &file, "--passphrase-file", &words, "--with-authority", &data]).await?;
    let (code, _, err) = istiod.istioctl(&["backup", &file, "--passphrase-file", &words]).await?;
    ensure!(code == 1 && err.contains("must not exist"), "{code}: {err}");
    let seen = async |istiod: &Istiod| -> anyhow::Result<[String; 4]> {
        let audit = istiod.istioctl_ok(&["audit", "list", "-o", "json"]).await?;
        let objects = istiod.istioctl_ok(&["get", "all", "-A", "-o", "json"]).await?;
        let items = json(&objects)?.get("items").map(ToString::to_string).context("no items")?;
        let (history, tokens) = (
            istiod.istioctl_ok(&["history", "-o", "json"]).await?,
            istiod.istioctl_ok(&["token", "list", "-o", "json"]).await?,
        );
        Ok([audit, items, history, tokens])
    };
    let before = seen(&istiod).await?;

    let restore = ["restore", &file, "--passphrase-file", &words, "--data-dir", &fresh];
    istiod.istioctl_ok(&restore).await?;
    let (code, _, err) = istiod.istioctl(&restore).await?;
    ensure!(code == 1 && err.contains("already"), "{code}: {err}");
    let restored = Istiod::start(new.path(), &[]).await?;
    ensure!(seen(&restored).await? == before);
    let roots = [&data, &fresh].map(|dir| std::fs::read(std::path::Path::new(dir).join("ca/root-cert.pem")));
    let [old_root, new_root] = roots;
    ensure!(old_root? == new_root?, "the root is the same");
    let later = restored.apply(&rule("a", "three")).await?;
    let newest = istiod.istioctl_ok(&["history", "--limit", "1", "-o", "json"]).await?;
    let newest = json(&newest)?.pointer("/0/revision").and_then(Value::as_u64).context("no history")?;
    ensure!(later > newest, "revisions go on: {later} after {newest}");
    restored.istioctl_ok(&["audit", "verify"]).await?;
    Ok(())
}
