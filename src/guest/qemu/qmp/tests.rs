use super::*;
use std::os::unix::net::UnixListener;

/// A socket at which somebody says these lines, one at once and one more for each line that it hears.
fn somebody(lines: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut heard = BufReader::new(stream.try_clone().unwrap()).lines();
        for line in lines {
            if writeln!(stream, "{line}").is_err() || heard.next().is_none() {
                return;
            }
        }
    });
    (directory, path)
}

const GREETING_10: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}"#;

#[test]
fn answers_and_events_are_told_apart() {
    let (_directory, path) = somebody(&[
        GREETING_10,
        r#"{"return": {}, "id": 0}"#,
        "{\"event\": \"STOP\", \"data\": {}}\n{\"return\": {\"status\": \"paused\"}, \"id\": 1}",
        r#"{"error": {"class": "GenericError", "desc": "no such thing"}, "id": 2}"#,
    ]);
    let mut qmp = Qmp::connect(&path).unwrap();
    assert_eq!(qmp.version(), Version { major: 10, minor: 0, micro: 2 });
    assert_eq!(qmp.process(), Some(std::process::id()));
    assert_eq!(qmp.execute("query-status", &json!({})).unwrap()["status"], "paused");
    assert_eq!(qmp.events().try_recv().unwrap().name, "STOP");
    let error = qmp.execute("frobnicate", &json!({})).unwrap_err().to_string();
    assert_eq!(error, "QEMU does not do frobnicate: no such thing");
}

#[test]
fn who_is_no_qemu_that_can_be_moved_is_named() {
    for (lines, words) in [
        (
            &[
                r#"{"QMP": {"version": {"qemu": {"micro": 17, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}"#,
            ][..],
            "is of version 7.2.17, and moving it takes 9.0.0 or newer",
        ),
        (&["SSH-2.0-OpenSSH_9.2"], "is no QMP of QEMU"),
        (&["{}"], "is no QMP of QEMU"),
        (&[GREETING_10], "has closed its QMP socket"),
    ] {
        let (_directory, path) = somebody(lines);
        let error = Qmp::connect(&path).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let error = Qmp::connect(Path::new("/nowhere/qmp")).unwrap_err().to_string();
    assert!(error.contains("-qmp unix:/nowhere/qmp,server=on,wait=off"), "{error}");
}
