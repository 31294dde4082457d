from cellstate_cli import main


raise SystemExit(main())
