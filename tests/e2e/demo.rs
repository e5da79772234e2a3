//! The demo, as a person who has just cloned the repository runs it.

use anyhow::ensure;
use tests::program;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demo_shows_what_it_claims() -> anyhow::Result<()> {
    let started = tokio::time::Instant::now();
    let ran = tokio::task::spawn_blocking(|| program::run("istioctl", &[], &["demo", "--check"]));
    let (code, out, err) = ran.await??;
    println!("{out}");
    ensure!(code == 0, "exit code {code}: {out}{err}");
    println!("the demo took {:.1?}", started.elapsed());
    Ok(())
}
