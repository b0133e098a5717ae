//! Watching migrations on stderr while they run.

use std::collections::HashMap;
use std::io::{self, IsTerminal, Write};

use indicatif::{MultiProgress, ProgressDrawTarget};

use super::progress::{phase, progress_line};
use crate::host::api::migration::{Direction, Migration};
use crate::host::progress::Progress;

/// Shows migrations, a line each: lines that change on a terminal, else plain lines, at most one a second for each migration
/// and one for each phase. It never fails, and a migration does not end because nobody can watch it.
pub struct Watch {
    how: How,
    shown: HashMap<(String, Direction), Progress>,
}

enum How {
    /// Lines that are drawn anew.
    Terminal(MultiProgress),
    /// Plain lines into what this opens.
    Lines(Box<dyn Fn() -> Box<dyn Write + Send> + Send>),
    Nothing,
}

impl Watch {
    /// On stderr; nothing at all with `json`, whose reader is a program.
    #[must_use]
    pub fn on_stderr(json: bool) -> Self {
        let how = if json {
            How::Nothing
        } else if io::stderr().is_terminal() {
            How::Terminal(MultiProgress::with_draw_target(ProgressDrawTarget::stderr()))
        } else {
            How::Lines(Box::new(|| Box::new(io::stderr())))
        };
        Self { how, shown: HashMap::new() }
    }

    /// Shows where a migration stands. Cheap; may be called as often as there is news. With one that is over, its line on a
    /// terminal goes away, since an account follows.
    pub fn update(&mut self, migration: &Migration) {
        let key = (migration.id.clone(), migration.direction);
        let progress = match (self.shown.remove(&key), &self.how) {
            (Some(progress), _) => Some(progress),
            (None, How::Terminal(several)) => Some(Progress::among(several)),
            (None, How::Lines(open)) => Some(Progress::lines(open())),
            (None, How::Nothing) => None,
        };
        let Some(mut progress) = progress else { return };
        progress.show(&phase(migration), progress_line(migration));
        if migration.state.is_over() {
            progress.finish();
        } else {
            self.shown.insert(key, progress);
        }
    }

    /// Shows these, and takes away the lines of those that are not among them.
    pub fn update_all(&mut self, migrations: &[Migration]) {
        let there = |id: &str, direction| {
            migrations.iter().any(|migration| migration.id == id && migration.direction == direction)
        };
        let gone = self.shown.keys().filter(|(id, direction)| !there(id, *direction));
        for key in gone.cloned().collect::<Vec<_>>() {
            if let Some(progress) = self.shown.remove(&key) {
                progress.finish();
            }
        }
        for migration in migrations {
            self.update(migration);
        }
    }

    /// Takes every line away, so that what follows stands alone.
    pub fn finish(self) {
        for progress in self.shown.into_values() {
            progress.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::host::api::migration::MigrationState;
    use crate::host::view::sample;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn piped() -> (Kept, Watch) {
        let kept = Kept::default();
        let out = kept.clone();
        let how = How::Lines(Box::new(move || Box::new(out.clone())));
        (kept, Watch { how, shown: HashMap::new() })
    }

    fn lines(kept: &Kept) -> Vec<String> {
        String::from_utf8(kept.0.lock().unwrap().clone()).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn a_pipe_gets_a_line_for_each_phase_of_each_migration() {
        let (kept, mut watch) = piped();
        let waiting = Migration { state: MigrationState::Waiting, progress: None, ..sample::running() };
        for _ in 0..100 {
            watch.update(&waiting);
        }
        for _ in 0..100 {
            watch.update_all(&[sample::running(), sample::incoming()]);
        }
        watch.update(&sample::completed());
        let lines = lines(&kept);
        let begin: Vec<&str> = lines.iter().map(|line| line.split([',', ';']).next().unwrap()).collect();
        assert_eq!(
            begin,
            [
                "web1 to host-b: waiting for a slot",
                "web1 to host-b: pre-copy",
                "WARNING insecure",
                "web1 to host-b: completed"
            ]
        );
    }

    #[test]
    fn what_is_not_reported_any_more_is_forgotten() {
        let (kept, mut watch) = piped();
        watch.update_all(&[sample::running(), sample::incoming()]);
        watch.update_all(&[sample::incoming()]);
        assert_eq!(watch.shown.len(), 1);
        watch.update(&sample::completed());
        assert_eq!(watch.shown.len(), 1);
        assert_eq!(lines(&kept).len(), 3);
        watch.finish();
    }

    #[test]
    fn a_program_sees_nothing() {
        let mut watch = Watch::on_stderr(true);
        watch.update(&sample::running());
        assert!(watch.shown.is_empty());
    }
}
